package sandboxd

// Machine makes sandboxes of one kind.
type Machine interface {
	// Name is how operators know this kind: "namespace".
	Name() string
}
