"""A demo of an image classifier in the browser, and the same as an API: upload an image, read the most likely classes.

Everything that a stranger can send is judged in `uploads` before anything opens it.
"""

import argparse
import os
import sys


# Gradio reads these while it is imported. Without them it reports every launch to its makers, and keeps each visitor's
# images in the visitor's browser storage.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

from classifier import load_classifier
from page import LAUNCH_OPTIONS, build_demo
from transformers import logging
from uploads import own_upload_folder
from version import default_model, describe_version

from modeling_vit_custom.command_line import Parser, report_user_errors


def main(argv: list[str] | None = None) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with report_user_errors("app.py"):
        arguments = parse_arguments(argv)
        model, revision = (arguments.model, None) if arguments.model else default_model()
        classifiers = [load_classifier(model, arguments.trust_remote_code, revision)]
        classifiers += [load_classifier(each, arguments.trust_remote_code) for each in arguments.compare]
    with own_upload_folder():
        with report_user_errors("app.py"):
            demo = build_demo(classifiers, describe_version())
        try:
            demo.launch(server_port=arguments.port, **LAUNCH_OPTIONS)
        except OSError as error:
            reason = str(error).split(". ")[0]
            print(f"app.py: error: cannot serve ({reason}): pass another --port", file=sys.stderr)
            return 2
    return 0


def port_number(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not between 1 and 65535")
    return port


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "app.py",
        "Show an image classifier in the browser: what it answers, what that rests on, what it learnt.",
        "examples:\n  python spaces/app.py\n  python spaces/app.py --model runs/digits --port 7861\n"
        "  python spaces/app.py --model runs/mine --compare runs/other",
    )
    parser.add_argument(
        "--model",
        metavar="DIR|user/name",
        help="a folder written by save_pretrained, or a model of the Hub (default: the one that comes along)",
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="DIR|user/name", help="others to compare it with, of ViTs' kinds"
    )
    parser.add_argument("--port", type=port_number, metavar="N", help="default: the first free port from 7860 on")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run the Python files that come with the model, if its class is not installed; read them first",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
