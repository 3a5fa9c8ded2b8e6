// Validates resources of Gateway API and of Prometheus's operator. Reads a JSON array, and writes an array of problems.
import { HTTPRoute } from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1/HTTPRoute";
import { PodMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor";
import { PrometheusRule } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule";

const kinds = { HTTPRoute, PodMonitor, PrometheusRule };
let text = "";
for await (const chunk of process.stdin) text += chunk;
const problems = [];
for (const manifest of JSON.parse(text)) {
  try {
    new kinds[manifest.kind](manifest).validate();
  } catch (error) {
    problems.push(`${manifest.kind} ${manifest.metadata.name}: ${error.message}`);
  }
}
console.log(JSON.stringify(problems));
