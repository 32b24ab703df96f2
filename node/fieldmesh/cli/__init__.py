"""The command line. Each module holds one group of commands; what is slow to import is imported when it is
used."""
