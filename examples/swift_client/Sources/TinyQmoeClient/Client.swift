/// A client of `python -m tiny_qmoe_mlx.server`: a chat's answer as an asynchronous sequence of pieces of text.
///
/// Foundation alone. Cancelling the task that reads the pieces closes the connection, and the server stops writing.

import Foundation

/// A message of a chat: its role is "system", "user" or "assistant".
public struct Message: Codable, Sendable {
    public let role: String
    public let content: String

    public init(role: String, content: String) {
        self.role = role
        self.content = content
    }
}

/// What the server refused, in its own words, or what it sent that is no answer.
public struct ServerError: LocalizedError, Sendable {
    public let status: Int
    public let message: String

    public var errorDescription: String? { message }
}

/// A server, and how it should answer.
public struct Client: Sendable {
    public var server: URL
    public var maxTokens: Int
    public var temperature: Double
    public var key: String?

    /// - Parameters:
    ///   - server: as the server printed it, `http://127.0.0.1:8080` by default.
    ///   - key: of a server that was started with one.
    public init(
        server: URL = URL(string: "http://127.0.0.1:8080")!,
        maxTokens: Int = 512,
        temperature: Double = 0,
        key: String? = nil
    ) {
        self.server = server
        self.maxTokens = maxTokens
        self.temperature = temperature
        self.key = key
    }

    /// The answer to a chat, piece by piece while it is written.
    ///
    /// - Throws: ServerError where the server refused or broke off, URLError where there is none.
    public func answer(to messages: [Message]) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { pieces in
            let task = Task {
                do {
                    try await read(messages, into: pieces)
                    pieces.finish()
                } catch {
                    pieces.finish(throwing: error)
                }
            }
            pieces.onTermination = { _ in task.cancel() }
        }
    }

    private func read(
        _ messages: [Message], into pieces: AsyncThrowingStream<String, Error>.Continuation
    ) async throws {
        let (bytes, response) = try await URLSession.shared.bytes(for: request(for: messages))
        let status = (response as? HTTPURLResponse)?.statusCode ?? 0
        guard status == 200 else {
            throw ServerError(status: status, message: try await refusal(in: bytes, status: status))
        }
        for try await line in bytes.lines {
            // comments, which keep a connection alive while a prompt is read, begin with a colon
            guard line.hasPrefix("data: ") else { continue }
            let data = Data(line.dropFirst("data: ".count).utf8)
            if data == Data("[DONE]".utf8) { return }
            if let refused = try? JSONDecoder().decode(Refusal.self, from: data) {
                throw ServerError(status: status, message: refused.error.message)
            }
            let event = try JSONDecoder().decode(Event.self, from: data)
            if let text = event.choices.first?.delta.content, !text.isEmpty {
                pieces.yield(text)
            }
        }
        throw ServerError(status: status, message: "the server closed the connection before the answer had ended")
    }

    private func request(for messages: [Message]) throws -> URLRequest {
        var request = URLRequest(url: server.appendingPathComponent("v1/chat/completions"))
        request.httpMethod = "POST"
        request.timeoutInterval = 600  // between two bytes: a long prompt is read before the first piece
        request.setValue("application/json", forHTTPHeaderField: "Content-Type")
        if let key {
            request.setValue("Bearer \(key)", forHTTPHeaderField: "Authorization")
        }
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        request.httpBody = try encoder.encode(
            Body(messages: messages, maxTokens: maxTokens, temperature: temperature, stream: true))
        return request
    }

    private func refusal(in bytes: URLSession.AsyncBytes, status: Int) async throws -> String {
        var data = Data()
        for try await byte in bytes.prefix(1 << 16) {
            data.append(byte)
        }
        let refused = try? JSONDecoder().decode(Refusal.self, from: data)
        return refused?.error.message ?? "the server answered with status \(status)"
    }
}

// What goes over the wire.

struct Body: Encodable {
    let messages: [Message]
    let maxTokens: Int
    let temperature: Double
    let stream: Bool
}

struct Event: Decodable {
    struct Choice: Decodable {
        let delta: Delta
    }
    struct Delta: Decodable {
        let content: String?
    }
    let choices: [Choice]
}

struct Refusal: Decodable {
    struct Reason: Decodable {
        let message: String
    }
    let error: Reason
}
