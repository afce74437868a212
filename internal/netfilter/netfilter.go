// Package netfilter carries messages to the kernel's packet filter: those that the nftables library makes, and those
// that end tracked flows. The library's own way there asks select whether an answer is waiting, and select knows no descriptor above 1023: a
// process with a thousand connections panics in it. Here nothing waits, because the kernel has answered when the send returns.
// Package netdev, package egress and the laboratory use it.
package netfilter
