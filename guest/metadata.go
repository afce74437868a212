package guest

import (
	"errors"
	"net/http"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	metadataHeader = "X-Metadata-"
	// metadataAttr is the prefix of the extended attributes that SDKs document.
	metadataAttr = "user.e2b."
	// The kernel's own limits for a name and a value.
	maxAttrName  = 255
	maxAttrValue = 64 << 10
)

// parseMetadata collects the X-Metadata headers of an upload. Header names have no case, so keys are in lower case.
func parseMetadata(h http.Header) (map[string]string, error) {
	var metadata map[string]string
	for name, values := range h {
		if len(name) <= len(metadataHeader) || !strings.EqualFold(name[:len(metadataHeader)], metadataHeader) {
			continue
		}
		key, value := strings.ToLower(name[len(metadataHeader):]), values[len(values)-1]
		if len(metadataAttr)+len(key) > maxAttrName {
			return nil, refuse(http.StatusBadRequest, "metadata key is longer than %d bytes", maxAttrName-len(metadataAttr))
		}
		for i := range len(value) {
			if value[i] < 0x20 || value[i] > 0x7e {
				return nil, refuse(http.StatusBadRequest, "metadata value of '%s' is not printable US-ASCII", key)
			}
		}
		if metadata == nil {
			metadata = map[string]string{}
		}
		metadata[key] = value
	}
	return metadata, nil
}

// replaceMetadata makes metadata all that there is on f: new content does not keep what was said of the old. A filesystem without user
// attributes is an error only when there is something to store.
func replaceMetadata(f *os.File, metadata map[string]string) error {
	fd := int(f.Fd())
	for _, name := range attrNames(func(buf []byte) (int, error) { return unix.Flistxattr(fd, buf) }) {
		if _, keep := metadata[name[len(metadataAttr):]]; !keep {
			if err := unix.Fremovexattr(fd, name); err != nil && !errors.Is(err, unix.ENODATA) {
				return err
			}
		}
	}
	for key, value := range metadata {
		err := unix.Fsetxattr(fd, metadataAttr+key, []byte(value), 0)
		switch {
		case errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.EPERM):
			return refuse(http.StatusBadRequest, "this filesystem stores no metadata")
		case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ERANGE):
			return refuse(http.StatusBadRequest, "metadata is too large")
		case err != nil:
			return err
		}
	}
	return nil
}

// readMetadata is the metadata of the file at path, not of what a link there names; nil when there is none.
func readMetadata(path string) map[string]string {
	var metadata map[string]string
	for _, name := range attrNames(func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) }) {
		value := make([]byte, 256)
		n, err := unix.Lgetxattr(path, name, value)
		if errors.Is(err, syscall.ERANGE) {
			value = make([]byte, maxAttrValue)
			n, err = unix.Lgetxattr(path, name, value)
		}
		if err != nil {
			continue
		}
		if metadata == nil {
			metadata = map[string]string{}
		}
		// Anybody in the sandbox can set these; JSON wants valid UTF-8.
		metadata[strings.ToValidUTF8(name[len(metadataAttr):], "\uFFFD")] = strings.ToValidUTF8(string(value[:n]), "\uFFFD")
	}
	return metadata
}

// attrNames lists our attributes. Most files have none, so the first try is without a large buffer.
func attrNames(list func([]byte) (int, error)) []string {
	var small [256]byte
	buf := small[:]
	n, err := list(buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, maxAttrValue)
		n, err = list(buf)
	}
	if err != nil {
		return nil
	}
	var names []string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if len(name) > len(metadataAttr) && strings.HasPrefix(name, metadataAttr) {
			names = append(names, name)
		}
	}
	return names
}
