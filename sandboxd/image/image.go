// Package image makes templates: from an OCI image or a directory the read-only root image that all sandboxes of a template share, with the
// kernel and the initramfs to boot it. It also makes the writable layers that go on top. It boots nothing and knows nothing of
// machines; sandboxd calls it.
//
// Layers come from strangers. They are merged in memory, content goes to one nameless file, and the root image is written from both:
// no file of a layer is ever created on the node, so there is no path to escape by, no owner to become and no root to need.
package image
