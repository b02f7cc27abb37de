"""`python -m tinyalign_cli`, as torchrun and accelerate start it."""

from .main import main

if __name__ == "__main__":
    main()
