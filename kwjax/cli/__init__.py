"""The command `kwjax`; needs the extra `cli`."""
