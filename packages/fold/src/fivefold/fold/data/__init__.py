"""From files of structures and alignments to what the network is fed."""
