"""The command line. Each module holds one group of commands; slow imports happen inside them."""
