"""The same job in hand-written loops, in other frameworks and here, side by side."""
