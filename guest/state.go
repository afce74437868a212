package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
)

const (
	settingsName = "settings.json"
	// maxSettings is more than an init can bring.
	maxSettings = 2 * maxInitBody
)

// savedSettings are what an agent needs to know that takes the place of another, or that boots from a disk which had one.
type savedSettings struct {
	Ready     bool              `json:"ready"` // an init has come since the machine booted
	Env       map[string]string `json:"env"`
	Token     string            `json:"token"`
	User      string            `json:"user"`
	Workdir   string            `json:"workdir"`
	Hostname  string            `json:"hostname"`
	Lifecycle string            `json:"lifecycle"`
	Stamp     time.Time         `json:"stamp"`
}

// loadSettings reads what was saved; nothing was: the zero value.
func loadSettings(dir *os.Root) (savedSettings, error) {
	f, err := dir.Open(settingsName)
	if errors.Is(err, fs.ErrNotExist) {
		return savedSettings{}, nil
	}
	if err != nil {
		return savedSettings{}, fmt.Errorf("load settings: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxSettings))
	if err != nil {
		return savedSettings{}, fmt.Errorf("load settings: %w", err)
	}
	var s savedSettings
	if err := json.Unmarshal(raw, &s); err != nil {
		return savedSettings{}, fmt.Errorf("load settings: %w", err)
	}
	if _, err := environment(account{}, s.Env); err != nil {
		return savedSettings{}, fmt.Errorf("load settings: %w", err)
	}
	return s, nil
}

// saveSettings replaces what was saved in one step. It is not forced to the disk: the next agent of this boot sees it anyway, and whoever
// wants to keep the disk syncs it.
func saveSettings(dir *os.Root, s savedSettings) error {
	raw, err := json.Marshal(s)
	if err != nil {
		panic("BUG: settings are text: " + err.Error())
	}
	const temp = settingsName + ".new"
	if err := dir.WriteFile(temp, raw, 0o600); err != nil {
		return fmt.Errorf("save settings: %w", err)
	}
	if err := dir.Rename(temp, settingsName); err != nil {
		return fmt.Errorf("save settings: %w", err)
	}
	return nil
}
