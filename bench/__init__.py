"""The project's services against published servers, on the same sentences, with one client."""
