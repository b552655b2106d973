"""The network, module by module in the names of the AlphaFold 2 paper's supplement."""
