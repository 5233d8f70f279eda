"""The client commands of the command line, against a broker made by the tests."""
