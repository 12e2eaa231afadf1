"""What the experiments share: options, stages, tables, reports. Not a public interface."""
