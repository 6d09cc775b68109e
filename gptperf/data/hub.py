"""What to do by hand where the Hugging Face hub cannot be reached."""

import os

__all__ = ["CACHE", "by_hand"]

CACHE = "or copy the cache of another machine, ~/.cache/huggingface, and let HF_HOME name the copy"
"""Second way for what is downloaded to the cache of the hub; a data set is streamed and is not in it."""


def by_hand(files: str, page: str, use: str) -> str:
    """Returns a sentence that says which files to fetch, from where, and how to use them.

    Args:
        files: The files, in words.
        page: Path of their page on the hub, such as "datasets/REPO/tree/main".
        use: What to do with the folder that holds them, FOLDER.
    """
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return f"By hand: fetch {files} from {url}/{page} into FOLDER and {use}; HF_ENDPOINT may name a mirror"
