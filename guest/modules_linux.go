package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// The initramfs has these, see package image.
const (
	modulesDir   = "/sluice/modules"
	modulesOrder = modulesDir + "/order" // file names in the order of loading, one to a line
)

// loadModules loads what the initramfs brought and frees the memory that it took there. One that does not load is reported and left out:
// whatever really needs it fails with a better reason.
func loadModules(log *slog.Logger) error {
	order, err := os.ReadFile(modulesOrder)
	if err != nil {
		return fmt.Errorf("load modules: %w", err)
	}
	for name := range strings.FieldsSeq(string(order)) {
		path := filepath.Join(modulesDir, filepath.Base(name))
		if err := loadModule(path); err != nil {
			log.Warn("module not loaded", "module", name, "error", err)
		}
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("forget module: %w", err)
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
