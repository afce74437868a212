package vmm

// Libraries opens libraries to tests, which take programs along themselves.
var Libraries = libraries
