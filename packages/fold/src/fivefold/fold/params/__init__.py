"""Parameters of AlphaFold, OpenFold, MLPerf and ScaleFold, read and written without loss."""
