package api

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
)

//go:embed openapi.yaml
var specYAML []byte

// operation is one operation of openapi.yaml, and what the steps before it need to know.
type operation struct {
	id      string
	open    bool                  // needs no key
	sandbox bool                  // is about the sandbox named in its path
	named   bool                  // is about the template or snapshot named in its path
	creates bool                  // makes a sandbox
	lists   bool                  // answers with as much as there is: sandboxes, snapshots, lines of a log
	body    *openapi3.RequestBody // nil when it takes none
	route   *routers.Route
}

var longLists = []string{"listSandboxes", "listSandboxesPaged", "listSnapshots", "getSandboxLogs", "getSandboxLogsPaged"}

// loadOperations reads the embedded openapi.yaml. The keys are the patterns under which the generated code registers.
func loadOperations() (map[string]*operation, error) {
	doc, err := openapi3.NewLoader().LoadFromData(specYAML)
	if err != nil {
		return nil, fmt.Errorf("load openapi.yaml: %w", err)
	}
	if err := doc.Validate(context.Background()); err != nil {
		return nil, fmt.Errorf("check openapi.yaml: %w", err)
	}
	operations := make(map[string]*operation)
	for path, item := range doc.Paths.Map() {
		for method, spec := range item.Operations() {
			op := &operation{
				id:      spec.OperationID,
				open:    spec.Security != nil && len(*spec.Security) == 0,
				sandbox: strings.Contains(path, "{sandboxID}"),
				creates: spec.OperationID == "createSandbox" || spec.OperationID == "createSandboxSecured",
				named:   strings.Contains(path, "{templateID}"),
				lists:   slices.Contains(longLists, spec.OperationID),
				route:   &routers.Route{Spec: doc, Path: path, PathItem: item, Method: method, Operation: spec},
			}
			if spec.RequestBody != nil {
				op.body = spec.RequestBody.Value
			}
			operations[method+" "+path] = op
		}
	}
	return operations, nil
}

// validate holds the request against openapi.yaml. What the contract words itself, such as the bounds of timeout, is left to the
// operations.
func (op *operation) validate(r *http.Request, body []byte) error {
	if _, err := url.ParseQuery(r.URL.RawQuery); err != nil { // net/http leaves such pairs out: a filter with a typo would match everything
		return fail(http.StatusBadRequest, "validation error: query: %s", clip(err.Error()))
	}
	if op.body != nil && len(body) > 0 {
		if err := checkSyntax(body); err != nil {
			return err
		}
		if r.Header.Get("Content-Type") == "" {
			r.Header.Set("Content-Type", "application/json")
		}
	}
	input := &openapi3filter.RequestValidationInput{
		Request:    r,
		PathParams: map[string]string{},
		Route:      op.route,
		Options: &openapi3filter.Options{
			AuthenticationFunc:  openapi3filter.NoopAuthenticationFunc, // authorize has done it
			SkipSettingDefaults: true,
		},
	}
	for _, name := range []string{"sandboxID", "templateID"} {
		if value := r.PathValue(name); value != "" {
			input.PathParams[name] = value
		}
	}
	if err := openapi3filter.ValidateRequest(r.Context(), input); err != nil {
		return fail(http.StatusBadRequest, "validation error: %s", clip(describe(err)))
	}
	return nil
}

func checkSyntax(body []byte) error {
	if !utf8.Valid(body) {
		return fail(http.StatusBadRequest, "Error when parsing request: the body is not UTF-8")
	}
	var any json.RawMessage
	if err := json.Unmarshal(body, &any); err != nil {
		return fail(http.StatusBadRequest, "Error when parsing request: %v", err)
	}
	return nil
}

// describe says where and what, in one line; the library's own text has the whole schema in it.
func describe(err error) string {
	where := "request"
	if e, ok := errors.AsType[*openapi3filter.RequestError](err); ok {
		switch {
		case e.Parameter != nil:
			where = fmt.Sprintf("parameter %q in %s", e.Parameter.Name, e.Parameter.In)
		case e.RequestBody != nil:
			where = "request body"
		}
		if schema, ok := errors.AsType[*openapi3.SchemaError](e.Err); ok {
			if pointer := schema.JSONPointer(); len(pointer) > 0 {
				where += fmt.Sprintf(" at %q", "/"+strings.Join(pointer, "/"))
			}
			return where + ": " + schema.Reason
		}
		if e.Err != nil {
			return where + ": " + e.Err.Error()
		}
		return where + ": " + e.Reason
	}
	return where + ": " + err.Error()
}
