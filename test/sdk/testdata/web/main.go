// Command web is what an image of the tests runs: on port 8000 it says as whom it runs, where, and what it finds there.
package main

import (
	"encoding/json"
	"log"
	"net/http"
	"os"
	"time"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		dir, err := os.Getwd()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		names := map[string]bool{}
		for _, name := range []string{"hidden", "dir/old", "dir/new", "link"} {
			_, err := os.Stat(name)
			names[name] = err == nil
		}
		_ = json.NewEncoder(w).Encode(map[string]any{
			"uid": os.Getuid(), "dir": dir, "greeting": os.Getenv("GREETING"), "files": names,
		})
	})
	server := &http.Server{Addr: ":8000", ReadHeaderTimeout: time.Minute}
	log.Fatal(server.ListenAndServe())
}
