"""The command line, a package of its own (`tinyalign_cli`): it starts without importing `tinyalign_vlm`."""
