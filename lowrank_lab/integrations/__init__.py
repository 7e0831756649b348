"""The techniques in other training loops: a callback for each. Import the one of your library."""
