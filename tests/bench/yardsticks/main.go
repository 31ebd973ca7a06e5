// Command yardsticks is what the bench of the gateway needs beside llamavisor: a child that answers as fast and as evenly
// as told, a minimal reverse proxy to compare with, and a load that measures. Standard library only.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if len(os.Args) < 2 {
		fail(fmt.Errorf("usage: %s child|proxy|requests|streams|hold ARGUMENT...", filepath.Base(os.Args[0])))
	}
	work := map[string]func([]string) error{
		"child":    runChild,
		"proxy":    runProxy,
		"requests": loadRequests,
		"streams":  loadStreams,
		"hold":     holdRequests,
	}[os.Args[1]]
	if work == nil {
		fail(fmt.Errorf("there is no %q", os.Args[1]))
	}
	if err := work(os.Args[2:]); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// tell prints one line of JSON, which the bench reads.
func tell(result any) error {
	return json.NewEncoder(os.Stdout).Encode(result)
}
