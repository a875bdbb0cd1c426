"""What commands show to people, in 80 columns."""
