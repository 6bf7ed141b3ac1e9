"""From (instruction, text) to token ids, pool mask and the flat batch: the only such path."""
