"""The language that all rooms speak of a network: names, dataflow rewriting, constants, evaluation, operators."""
