"""``python -m prunus`` is the command ``prunus``."""

from prunus.cli import app

if __name__ == "__main__":
    app(prog_name="prunus")
