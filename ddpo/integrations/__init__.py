"""The losses inside other libraries' trainers."""
