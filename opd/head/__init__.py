"""The LM-head pass: the only code that holds a tile of tokens by vocabulary."""
