"""What reports are shown as: pages of HTML, and how figures look."""
