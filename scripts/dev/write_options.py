"""Write the options of all commands to `src/hf_regvit/app/options.json`, from which the command line reads them.

A test compares them, so that a new or renamed option is visible in review. Run this script after a deliberate change.
"""

from hf_regvit.app.recipes import write_options

if __name__ == "__main__":
    write_options()
