"""``python -m tiny_onn`` is ``tiny-onn``."""

from tiny_onn.cli.main import main

if __name__ == "__main__":
    main()
