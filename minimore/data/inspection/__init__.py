"""What is in files of pairs, and what is wrong with them."""
