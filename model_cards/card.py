"""Rebuild the card of a checkpoint from what its training run left behind: facts, and the figures that show images."""

from pathlib import Path

from model_cards.facts import read_run
from model_cards.metadata import find_card_errors
from model_cards.rendering import CARD, find_parts, write_card
from modeling_vit_custom.command_line import Parser, report_user_errors


EXAMPLES = """\
examples:
  python -m model_cards.card runs/digits
  python -m model_cards.card runs/digits --check

What was written into README.md outside of the generated parts is kept."""


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m model_cards.card", __doc__, EXAMPLES)
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="a folder that a training run left")
    parser.add_argument("--check", action="store_true", help="only say what the Hub would object to in its card")
    with report_user_errors("card"):
        arguments = parser.parse_args(argv)
        if not arguments.check:
            rebuild_card(arguments.folder)
        card = arguments.folder / CARD
        text = card.read_text(encoding="utf-8")
        find_parts(text)
        errors = find_card_errors(text, arguments.folder)
        if errors:
            raise ValueError(f"{str(card)!r}: {'; '.join(errors)}")
    print(card)


def rebuild_card(folder: Path) -> None:
    """Raises ValueError if the folder holds no facts of a run."""
    write_card(folder, read_run(folder), keep_edits=True)


if __name__ == "__main__":
    main()
