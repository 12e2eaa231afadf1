"""What the experiments share: options, image sets, tables, reports. Not a public interface."""
