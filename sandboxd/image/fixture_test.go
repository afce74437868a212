package image

import (
	"encoding/json"
	"fmt"
	"os"
	"testing"
)

// testKernel is the kernel package that is unpacked where SLUICE_KERNEL_ROOT says or where setup has done it, or that is installed here.
func testKernel(t *testing.T) Kernel {
	t.Helper()
	root := os.Getenv("SLUICE_KERNEL_ROOT")
	if _, err := os.Stat("../../.build/kernel/boot"); root == "" && err == nil {
		root = "../../.build/kernel"
	}
	k, err := FindKernel(root, "")
	if err != nil {
		t.Skipf("SKIP: %v; or set SLUICE_KERNEL_ROOT to the directory that it was unpacked to", err)
	}
	if k.Modules == "" {
		t.Skipf("SKIP: the kernel %s has no modules to load", k.Image)
	}
	return k
}

// dockerArchive is what docker save writes.
func dockerArchive(t testing.TB, layers [][]byte) []byte {
	t.Helper()
	var names, ids []string
	var files []file
	for i, l := range layers {
		names = append(names, fmt.Sprintf("%d/layer.tar", i))
		ids = append(ids, digestOf(l))
		files = append(files, file{name: names[i], body: string(l)})
	}
	config := mustJSON(t, map[string]any{
		"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": ids},
		"config": map[string]any{
			"User": "user", "WorkingDir": "/home/user", "Env": []string{"A=1", "B=2"}, "Cmd": []string{"serve"},
			"ExposedPorts": map[string]any{"8000/tcp": struct{}{}, "53/udp": struct{}{}, "443": struct{}{}},
		},
	})
	files = append(files,
		file{name: "config.json", body: config},
		file{name: "manifest.json", body: mustJSON(t, []any{map[string]any{"Config": "config.json", "RepoTags": []string{"test:1"}, "Layers": names}})},
	)
	return tarOf(t, files...)
}

func mustJSON(t testing.TB, v any) string {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}
