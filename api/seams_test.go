package api

import (
	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
)

var (
	_ Sandboxes = (*sandboxd.Manager)(nil)
	_ Nodes     = (routing.Store)(nil)
)
