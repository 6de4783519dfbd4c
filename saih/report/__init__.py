"""The only maker of HTML and pictures."""
