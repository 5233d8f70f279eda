"""The client commands of the command line, against a broker of the tests' own making."""
