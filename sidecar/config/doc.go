// Package config is what an operator writes down for one region: region.yaml.
//
// Always true of a Config that Load or Parse returned without an error:
//
//   - Every setting has a value: the one in the file or the one of Default.
//   - Every key of the file is known. A misspelt key is refused with its line,
//     since a setting that is silently ignored is worse than none.
//   - What can be judged without a server or the network has been judged:
//     names, addresses, durations, sizes and how they relate.
//
// All faults of a file are reported at once, each with file and line. What needs
// the server (its version, wal_level, privileges) is package catalog's to check.
//
// docs/configuration.md describes every setting; a test holds it to this package.
package config
