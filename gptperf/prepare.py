"""Turns text into a data set: `python -m gptperf.prepare WHAT [--name=NAME] ...`; see `--help`."""

import argparse
import signal
import sys
from collections.abc import Sequence

from gptperf.errors import main_guard

__all__ = ["main"]

_EXAMPLES = """\
WHAT is one of
  python_stdlib             the .py files of the running Python, about 11 MB; needs no download
  shakespeare               tiny Shakespeare, 1 MB, downloaded
  openwebtext, fineweb_edu, slimpajama_627b, hf:REPO[:CONFIG]
                            streamed from Hugging Face; needs pip install 'gptperf[hf]'
  PATH                      a text file, a .jsonl file with a document per line, or a folder whose text files are
                            the documents

The validation split is 5% of the documents, chosen by their hash (Hugging Face: 0.05%), or the last 10% of a single
text file.

examples
  python -m gptperf.prepare python_stdlib
  python -m gptperf.prepare my_notes/ --name=notes --val_fraction=0.1
  python -m gptperf.prepare openwebtext --tokenizer=gpt2
  python -m gptperf.prepare python_stdlib --tokenizer=train:8192 --name=stdlib_8k
  python -m gptperf.prepare hf:codeparrot/codeparrot-clean --text_field=content
  python -m gptperf.prepare python_stdlib --verify
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments `argv`; None means those of the process."""
    args = _parser().parse_args(argv)
    with main_guard(debug=args.debug):
        if args.verify:
            _verify(args)
            return
        from gptperf.data.prepare import prepare

        # SIGTERM ends the process with an exception, so that the writer removes its incomplete data set.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        optional = {} if args.shard_tokens is None else {"shard_tokens": args.shard_tokens}
        prepare(
            args.what,
            data_dir=args.data_dir,
            name=args.name,
            tokenizer=args.tokenizer,
            eot=args.eot,
            val_fraction=args.val_fraction,
            overwrite=args.overwrite,
            split=args.split,
            text_field=args.text_field,
            **optional,
        )


def _verify(args: argparse.Namespace) -> None:
    """Compares the tokens of an existing data set with its checksums."""
    from gptperf.data.shards import resolve_dataset, verify

    path = resolve_dataset(args.name or args.what, args.data_dir)
    print(f"{path}: {verify(path):,} tokens match their checksums")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gptperf.prepare",
        description="Turn text into a data set of token shards, DATA_DIR/NAME.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", metavar="WHAT", help="what to prepare, see below")
    parser.add_argument("--name", help="name of the data set (default: that of WHAT)")
    parser.add_argument("--data_dir", default="data", help="folder of data sets (default: data)")
    parser.add_argument(
        "--tokenizer",
        default="byte",
        help="byte; tiktoken's gpt2, cl100k_base, ...; a tokenizer.json or its folder; a data set, whose tokenizer it "
        "is; hf:REPO; train:N, a BPE of N ids that is trained on the text (default: byte)",
    )
    parser.add_argument("--eot", help="token that ends a document (default: the one that the tokenizer names)")
    parser.add_argument("--val_fraction", type=float, help="validation fraction, 0 to below 1 (default: see below)")
    parser.add_argument("--split", help="split of a Hugging Face data set (default: train)")
    parser.add_argument("--text_field", help="text field of a Hugging Face data set or .jsonl file (default: text)")
    parser.add_argument("--shard_tokens", type=int, help="tokens per shard (default: 100000000)")
    for flag, text in (
        ("overwrite", "replace an existing data set"),
        ("verify", "compare an existing data set with its checksums instead"),
        ("debug", "show the stack of an error"),
    ):
        parser.add_argument(f"--{flag}", type=_boolean, nargs="?", const=True, default=False, help=text)
    return parser


def _boolean(text: str) -> bool:
    if text not in ("True", "False", "true", "false"):
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted True or False")
    return text in ("True", "true")


if __name__ == "__main__":
    main()
