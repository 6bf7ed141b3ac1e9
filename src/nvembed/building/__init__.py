"""Building: from raw sources to training sets without duplicates and without evaluation texts."""
