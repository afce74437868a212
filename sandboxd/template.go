package sandboxd

// Template is what a sandbox is made from, and the size it gets.
type Template struct {
	ID        string   // what a client sees as templateID
	Aliases   []string // further names, lower case, without tag
	Root      string   // the machine's name for the root filesystem; "" is the one that the machine was set up with
	CPUs      int      // zero means 2
	MemoryMiB int      // zero means 512
	DiskMiB   int      // zero means 1024
}
