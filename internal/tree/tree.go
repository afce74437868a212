// Package tree removes directories that somebody else has filled, who may mean us harm: a sandbox, or a hypervisor that was taken over.
package tree
