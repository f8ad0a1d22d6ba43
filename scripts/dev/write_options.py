"""Write the options of all commands to `src/hf_regvit/app/options.json`, from which the command line reads them.

A test compares them, so that a new or renamed option is visible in review. Run this script after a deliberate change.
"""

import json

import transformers

from hf_regvit.app.recipes import options_of_command
from hf_regvit_cli import COMMANDS, OPTIONS


def main() -> None:
    commands = []
    for name in COMMANDS:  # one option per line, for the review of changes
        options = ",\n".join(json.dumps(option) for option in options_of_command(name))
        commands.append(f'"{name}": [\n{options}\n]')
    text = ",\n".join(commands)
    OPTIONS.write_text(f'{{"transformers": "{transformers.__version__}", "commands": {{\n{text}\n}}}}\n')


if __name__ == "__main__":
    main()
