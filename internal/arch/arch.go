// Package arch holds one test: the import table of the house style is true of the code.
package arch
