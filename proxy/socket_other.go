//go:build !linux

package proxy

func limitSocket(*clientConn, int) {}
