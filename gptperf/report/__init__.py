"""Pages and tables: one run as HTML, and the page engine that every command shares."""
