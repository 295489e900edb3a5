"""The miniature study: what rules and Gram matrices do to the demo's task, one change at a time."""
