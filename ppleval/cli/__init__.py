"""The command `ppleval`: files and data sets -> texts -> a table, a file, a picture."""
