"""Loss, optimizer, schedule, state and step: arrays in, arrays out; no files, SeqIO or loop."""
