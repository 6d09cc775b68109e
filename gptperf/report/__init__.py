"""Pages and tables: the HTML page of one run, and the page engine that all commands use."""
